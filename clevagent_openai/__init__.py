"""ClevAgent for OpenAI."""
