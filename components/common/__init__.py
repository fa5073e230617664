"""What all storeys share: files and their hashes, configs, the data's contracts, splits, the dataset on disk."""
