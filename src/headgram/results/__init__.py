"""The files of a study: where they lie, how they are written and checked, what they hold."""
