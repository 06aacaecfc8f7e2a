"""Weights -> people: one engine thread per replica behind a queue, OpenAI's HTTP interface in front of it, and the chat
page.
"""
