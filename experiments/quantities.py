"""Large numbers for a reader: bytes and floating-point operations."""


def describe_quantity(value: float, unit: str) -> str:
    """Returns three significant digits and a decimal prefix: 8.86 MB, 538 MB, 2.31 TFLOP."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} E{unit}"
