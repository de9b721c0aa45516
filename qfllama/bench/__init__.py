"""`qfllama bench`: what is measured (plan), how (measure, memory), and how it is shown (report)."""
