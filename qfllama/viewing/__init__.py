"""What a bounded cache holds, for people to look at."""
