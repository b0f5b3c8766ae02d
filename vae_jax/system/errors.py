"""The errors that a caller can meet. Each message is one line: where, what was found, what was expected, a remedy."""


class InputError(ValueError):
    """An option or a file that the caller gave cannot be used. Commands print the line and exit with code 2."""


class DataError(InputError):
    """An image set cannot be read or used."""


class WeightsError(InputError):
    """A state dict, a parameter tree or a weights file does not hold this model."""


class NonFiniteLossError(ArithmeticError):
    """Training has diverged: the loss is no longer a finite number. Commands exit with code 1."""


def reason(error: BaseException) -> str:
    """A library's error message, shortened to fit into one of ours."""
    text = str(error)
    if isinstance(error, KeyError) or not text:  # of a KeyError, the text is the bare key
        text = f"{type(error).__name__} {text}"
    return " ".join(text.split())[:150]
