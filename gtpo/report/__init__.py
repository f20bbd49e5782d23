"""What people look at: the before / after table, the plot of a run, and the comparison of two runs."""
