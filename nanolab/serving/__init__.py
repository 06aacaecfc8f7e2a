"""Weights -> people: one engine thread per replica, a queue per model, OpenAI's HTTP interface, and the chat page."""
