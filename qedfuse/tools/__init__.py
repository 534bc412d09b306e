"""Operations on whole images: functions that return data and print nothing."""
