"""What runs and watches the loop: reports, live clicks, replay, Airflow on one machine."""
