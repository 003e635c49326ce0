"""A driver: the whole window in one jitted step, `value_and_grad`."""
