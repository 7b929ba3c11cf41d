"""The command ``repvit-mm``. It is a package of its own because it must start fast and work even if torch is broken."""
