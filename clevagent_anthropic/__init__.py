"""ClevAgent for Anthropic."""
