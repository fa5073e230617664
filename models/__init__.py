"""The rankers, in plain torch: schema and batch, QIN, SDCNv3, losses, and how they are saved and loaded."""
