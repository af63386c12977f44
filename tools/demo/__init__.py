"""The laptop demo: scanned digits on canvases, their language, and the tiny backbones."""
