"""The command ``repvit-mm``. It stands beside the package: it must answer at once, and where torch is broken too."""
