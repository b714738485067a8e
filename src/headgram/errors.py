"""The one exception that headgram raises on purpose."""


class HeadgramError(Exception):
    """What is wrong, where (model, layer, tensor), and what to do, in one sentence."""
