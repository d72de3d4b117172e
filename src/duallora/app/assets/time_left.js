// As duallora.app.time_left: from the share that is done, in words.
const timeLeft = (started, share) => {
  const passed = (performance.now() - started) / 1000;
  if (passed < 2 || share <= 0 || share >= 1) return "";
  const left = (passed * (1 - share)) / share, minutes = Math.round(left / 60);
  if (left < 60) return "less than a minute left";
  return minutes < 90 ? `about ${minutes} ${minutes === 1 ? "minute" : "minutes"} left`
    : `about ${Math.round(left / 3600)} hours left`;
};
