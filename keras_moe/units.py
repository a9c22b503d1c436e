"""Large numbers as people read them."""


def count_text(number):
    """A large number in four digits: `"46.70 B"` for billions."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return str(number)


def bytes_text(number):
    """Bytes in four digits: `"1.5 GiB"`; empty for None."""
    if number is None:
        return ""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB")):
        if number >= unit:
            return f"{number / unit:.4g} {name}"
    return f"{number / 2**10:.4g} KiB"
