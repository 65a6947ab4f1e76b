"""Engines that sample responses, behind one protocol."""
