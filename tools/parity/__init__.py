"""The gate between an export and the word "final": is this folder the model that was trained?"""
