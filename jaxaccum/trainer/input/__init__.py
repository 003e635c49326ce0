"""From a loader to micro-steps on devices. Knows no loss and no optimizer."""
