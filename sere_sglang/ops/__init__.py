"""``reroute()`` and its implementations. Nothing here imports SGLang."""
