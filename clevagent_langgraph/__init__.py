"""ClevAgent for LangGraph."""
