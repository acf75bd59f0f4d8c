"""What a run needs in memory: foretold, measured, lowered, and what to change where it did not suffice."""
