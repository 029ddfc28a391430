"""The finetune: its degrees of freedom, its student and its loop."""
