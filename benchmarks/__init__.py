"""How speed is told: ratios of medians taken in turn, in one run, after the results were checked equal."""
