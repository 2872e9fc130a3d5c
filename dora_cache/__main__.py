"""``python -m dora_cache`` is the command ``dora-cache``."""

from dora_cache.cli import main

if __name__ == "__main__":
    main()
