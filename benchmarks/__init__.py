"""What fastpref costs beside other ways to the same numbers, and beside what the machine can do: `fastpref bench`."""
