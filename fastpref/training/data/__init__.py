"""From rows to batches: where rows come from, their formats, token ids, order and layout."""
