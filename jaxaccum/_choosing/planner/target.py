"""Divides a target batch size."""


def split(target_batch_size: int, unit: int, what: str) -> int:
    """Returns how many `unit`s, which are `what`, make the target; ValueError names the nearest that can be made."""
    if not unit:
        raise ValueError(f"target_batch_size={target_batch_size} is no number of empty batches: {what} are 0.")
    quotient, rest = divmod(target_batch_size, unit)
    if rest:
        nearest = " and ".join(str(n * unit) for n in (quotient, quotient + 1) if n)
        raise ValueError(
            f"target_batch_size={target_batch_size} is not a multiple of {what}, {unit}; nearest: {nearest}."
        )
    return quotient


def divisors(number: int) -> list[int]:
    """Returns the divisors of `number`, smallest first."""
    return [n for n in range(1, number + 1) if number % n == 0]
