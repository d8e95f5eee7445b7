"""What is measured about the package; each module runs with ``python -m``."""
