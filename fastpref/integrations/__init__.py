"""fastpref in other people's trainers: one small file a trainer, each imported by its own name."""
