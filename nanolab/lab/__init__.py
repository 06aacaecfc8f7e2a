"""numbers -> knowledge."""
