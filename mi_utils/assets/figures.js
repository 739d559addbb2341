// Draws every figure of a page with plotly, in the colours of the page, light or dark.
(() => {
  const dark = matchMedia('(prefers-color-scheme: dark)');
  const tone = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // Figures are made for white paper. On a dark page their ink and paper follow the page's, and bars get lighter.
  const onDark = () => ({
    '#24292f': tone('--ink'), '#e3e6ea': tone('--line'), '#ffffff': tone('--paper'), '#000000': tone('--ink'),
    '#2166ac': '#4f9ad6', '#b2182b': '#e5646f', '#0072b2': '#3a9bd9',
  });

  function recoloured(value, tones) {
    if (typeof value === 'string') return tones[value] ?? value;
    if (Array.isArray(value)) return value.map(item => recoloured(item, tones));
    if (value === null || typeof value !== 'object') return value;
    // a colour scale stays: its colours are numbers
    return Object.fromEntries(Object.entries(value).map(
      ([key, item]) => [key, key === 'coloraxis' ? item : recoloured(item, tones)]));
  }

  function draw(holder) {
    const {data, layout, config} = JSON.parse(holder.querySelector('script').textContent);
    const tones = dark.matches ? onDark() : {};
    const shown = data.map(trace => trace.type === 'heatmap' ? trace : recoloured(trace, tones));
    // Without a mouse the buttons would always be there, over the title.
    const bar = matchMedia('(hover: hover)').matches ? {} : {displayModeBar: false};
    Plotly.react(holder.querySelector('.plot'), shown, recoloured(layout, tones), {...config, ...bar, responsive: true});
  }

  const drawAll = () => document.querySelectorAll('.figure').forEach(draw);
  drawAll();
  dark.addEventListener('change', drawAll);
})();
