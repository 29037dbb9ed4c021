"""Files in and out: everything that touches the disk goes through here.

Writes are atomic, reads execute nothing, and uint8 conversion, resize and crop happen here alone.
Reading order: files, images, batches, npz, token_files, sample_folder.
"""
