"""What the notebooks use: plots, attention maps, closed-form toys, set-up, exercises."""
