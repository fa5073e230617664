"""The rankers, in plain torch: schema and batch, QIN, SDCNv3, losses, checkpoints, and faster kernels."""
