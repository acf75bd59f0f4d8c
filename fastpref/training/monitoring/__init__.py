"""What a run tells: metrics, curves, evaluation, advice, and losses or gradients that are not finite."""
