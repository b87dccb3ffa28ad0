"""The Hugging Face Hub: names, snapshots in the standard cache, artifacts from it and to it.

Only ``formats`` and, when something is fetched or pushed, ``huggingface_hub`` are needed.
"""
