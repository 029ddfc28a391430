"""What a job did and how good its result is: plain data, and how it is shown."""
