"""How errors are told in one line."""

import textwrap


def one_line(error: Exception, longest: int = 1000) -> str:
    """An exception's message on one line, with its type where the message alone would not say much.

    Args:
        error: The exception.
        longest: Length in characters beyond which the message is cut off.
    """
    text = textwrap.shorten(str(error), longest, placeholder=' ...')
    return text if len(text) > 20 else f'{type(error).__name__}: {text}'
