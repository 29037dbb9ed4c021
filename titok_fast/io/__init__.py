"""Read and write files: images, arrays, tensors, tokens and sample folders.

Writes are atomic, reads execute no code, and only this package converts, resizes and crops images.
Reading order: files, images, batches, npz, token_files, sample_folder.
"""
