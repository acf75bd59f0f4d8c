"""One run on several processes: DDP, FSDP2 and DeepSpeed ZeRO-3."""
