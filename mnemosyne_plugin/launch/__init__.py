"""``mnemosyne run``: agents that keep survivors, and a nursery of warm workers."""
