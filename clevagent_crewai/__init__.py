"""ClevAgent for CrewAI."""
