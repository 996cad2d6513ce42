"""ClevAgent for the raw clients of OpenAI and Anthropic."""
