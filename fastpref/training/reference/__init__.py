"""The reference's log-probs: which model gives them, how they are computed once, and where they are kept."""
