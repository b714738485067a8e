"""The version of headgram, which every artifact states."""

__version__ = "0.1.0"
