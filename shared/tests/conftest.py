import os

# Read when huggingface_hub is imported; without it each look-up of a name that is not there is tried for half a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
