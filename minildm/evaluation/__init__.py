"""Evaluation: image and distribution metrics with intervals; does a sample follow its condition?"""
