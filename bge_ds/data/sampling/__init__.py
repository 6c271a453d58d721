"""(seed, epoch, step) -> rows, as pure functions. Knows neither Arrow nor torch."""
