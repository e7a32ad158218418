"""How speed is told: every figure a ratio of medians taken in turn, in one run, after the results were checked equal."""
